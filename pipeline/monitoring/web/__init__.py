"""The web page of ``isentrope monitor --web``: runs drawn live in a browser, from their folders alone."""

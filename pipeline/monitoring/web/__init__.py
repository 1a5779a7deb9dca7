"""The web page of ``isentrope monitor --web``: draws runs live in a browser, from their folders alone."""

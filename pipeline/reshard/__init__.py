"""Plans how weights go from learner ranks to engine ranks with the fewest bytes, and carries the plans out."""

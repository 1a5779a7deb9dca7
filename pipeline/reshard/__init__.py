"""Byte-minimal plans that carry weights from the learner's ranks to the engines' ranks, and their execution."""

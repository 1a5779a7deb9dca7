"""Advantages, the positive term, actuators, and the policy loss."""

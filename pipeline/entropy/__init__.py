"""Entropy control: band, sensors, controllers."""

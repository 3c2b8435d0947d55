"""Trains a profile's family in several ways (arms) and several times (seeds), and compares the results."""

"""Measuring: attribution methods on sets of images, and results with intervals."""

"""The sections of `make bench`: each compares what it measures with an alternative."""

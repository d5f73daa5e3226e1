"""Tests of everything; a package, so that no other of its name is found first."""

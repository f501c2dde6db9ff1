"""Generates machine code for lowered modules, links it to a library, and describes the library for people."""

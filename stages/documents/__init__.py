"""The JSON documents that stages hand to one another: the form of each, and how they are written."""

"""The machines we build for: target rows, the host's processor, and the toolchains that serve them."""

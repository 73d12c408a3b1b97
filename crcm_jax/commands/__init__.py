"""The commands of `crcm` that need more than a few lines, one a module."""

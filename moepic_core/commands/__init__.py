"""The commands of the command line, one file each. Importing this package imports nothing."""

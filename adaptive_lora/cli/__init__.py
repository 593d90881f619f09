"""The command line: each command reads arguments, calls one function of the library, and prints."""

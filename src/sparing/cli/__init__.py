"""The command line: every verb is parsed, calls one function of `sparing.api`, and its result is printed."""

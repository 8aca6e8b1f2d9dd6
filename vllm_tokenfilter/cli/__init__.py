"""The command line: parse, call, print; exit 0 ok, 1 check failed, 2 usage."""

"""One module a stage; see design in README.md."""

"""The command line: `lowvram` and its subcommands."""

"""Everything that is neither the method nor a log: files, simulators, sources of logs, runs."""

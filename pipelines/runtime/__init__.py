"""What every command runs on: flags, exit codes, processes, devices."""

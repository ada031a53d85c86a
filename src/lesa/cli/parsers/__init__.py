"""What each command is asked with: its options, its help and an example. Nothing here imports what a command needs."""

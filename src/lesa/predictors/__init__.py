"""The forecasters that are learned: their numbers, what they were made for, where they are kept."""

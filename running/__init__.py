"""What keeps a run going and its files whole: logs, signals, ranks, locks, the mirror on gs://."""

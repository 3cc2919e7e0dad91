"""One thin launcher per command: flags, gin, printing. The only folder that knows gin."""

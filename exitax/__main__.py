"""`python -m exitax ...` is `exitax ...`."""

from exitax.commands.main import main

if __name__ == '__main__':
  main()

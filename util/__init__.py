"""Commands (`python -m util.<command>`), and the rooms that they share with the mains."""

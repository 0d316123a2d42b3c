"""Commands (`python -m util.<command>`), and the packages that they share with the main scripts."""

"""The small language model this repository ships, its texts, and the script that trained it."""

"""How a pruned model reaches a server: targets and their rules, exports, and the servers' plugins."""

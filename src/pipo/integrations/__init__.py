"""PIPO inside serving engines that others make: plugins for the stock packages, never forks or copies."""

"""Data: from files to tokens on disk, with every row accounted for."""

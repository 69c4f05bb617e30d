"""Jobs: runs that are handed to a cluster, wait there for their turn, and go on when nobody watches."""

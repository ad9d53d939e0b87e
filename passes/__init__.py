"""Graph in, graph out: from a captured backbone to regions and a schedule."""

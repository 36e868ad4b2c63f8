"""Released weights of the paper's authors: file layouts, architecture, conversion, and pickles read as data."""

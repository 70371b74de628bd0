"""The report of runs: from run folders to one self-contained HTML page."""

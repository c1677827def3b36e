"""From a predictions file to numbers: metrics, intervals, tests and floors. Nothing here needs torch."""

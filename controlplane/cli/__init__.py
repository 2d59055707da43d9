"""The command line `loraplane`: a client of the public services, and `up`, which starts both planes on one machine."""

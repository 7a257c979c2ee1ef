"""`make bench`: measures a whole Fabula on this machine, through the door that users take."""

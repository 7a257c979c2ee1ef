"""The services of Fabula and the libraries they share; see services/README.md."""

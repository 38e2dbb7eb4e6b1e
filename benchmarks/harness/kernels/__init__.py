"""Kernels at one shape each: latentrt's, peers and physical limits. Importing the files of this room loads torch."""

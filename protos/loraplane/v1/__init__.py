"""Version 1 of the contracts; everything here but this file and the .proto sources is generated."""

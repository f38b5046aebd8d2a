"""What the tests share: small models, backbones and their inputs, servers and scripts; no tests."""

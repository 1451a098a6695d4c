"""The methods: each file is one, the config and its mathematics together."""

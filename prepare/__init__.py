"""Raw downloads -> prepared arrays, one script a data set: `python -m prepare.crema_d --help`."""

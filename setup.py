"The package as setuptools wants it; every value comes from settings.ini."

import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

root = Path(__file__).resolve().parent
config = ConfigParser(delimiters=['='])
config.read(root / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
readme = root / 'README.md'


def needs(group=''):
    return shlex.split(cfg.get(f'{group}requirements', ''))


extras = {o: needs(f'{o}_') for o in ('lab', 'train', 'data', 'verify')}
extras['dev'] = [r for o in extras.values() for r in o] + needs('dev_')
extras['experiments'] = needs('experiments_')

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    url=cfg['git_url'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    license='Apache-2.0',
    keywords=cfg['keywords'],
    packages=[cfg['lib_path']],
    # programs and style sheets of the widgets; the mark of a typed package (PEP 561)
    package_data={cfg['lib_path']: ['static/*', 'py.typed']},
    python_requires=f">={cfg['min_python']}",
    install_requires=needs(),
    extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split()},
)

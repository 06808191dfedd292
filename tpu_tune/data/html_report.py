"""HTML pages in one file each: rendered from templates, every value escaped, and nothing loaded from outside.

All pages extend `templates/base.html`, whose content policy forbids the page to load anything. A page of another room
has its template, styles and script in that package's own `templates`.
"""

from __future__ import annotations

import functools
from typing import Any

import jinja2


def render(package: str, template: str, **values: Any) -> str:
    """Return a page.

    Args:
      package: the package in whose folder `templates` the template is, e.g. `tpu_tune.data`.
      template: its file name.
      **values: what the template names; text is escaped unless it is `markupsafe.Markup`.
    """
    return _environment(package).get_template(template).render(**values)


@functools.cache
def _environment(package: str) -> jinja2.Environment:
    packages = dict.fromkeys((package, "tpu_tune.data"))
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in packages]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}  # of the filter `tojson`
    return environment

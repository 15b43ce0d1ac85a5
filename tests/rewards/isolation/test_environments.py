"""Environments in a worker process: an episode goes on where it was."""

from rewards.isolation.environments import LoadedEnvironments

SHOP = '''
class Shop:
    made = 0

    def reset(self, **columns):
        Shop.made += 1

    def buy(self, items: list) -> str:
        """Buys items.

        Args:
            items: What to buy.
        """
        items.clear()
        return str(Shop.made)
'''


def test_a_tool_that_changes_its_arguments_does_not_make_its_episode_begin_again(tmp_path):
    (tmp_path / "shop.py").write_text(SHOP)
    loaded = LoadedEnvironments("", [], {"": f"{tmp_path / 'shop.py'}:Shop"})
    history = []
    for items in (["tea"], ["milk"], ["bread"]):
        about = {"episode": "a", "environment": "", "columns": {}, "seeds": [1, 2], "ends": False}
        reply = loaded.call(about | {"history": list(history), "calls": [["buy", {"items": list(items)}]]})
        assert reply["results"] == [("1", False)]
        history.append(["buy", {"items": items}])

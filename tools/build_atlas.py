"""Builds the emoji world's atlas from an installed Noto Color Emoji font. Run once, by hand.

    python tools/build_atlas.py src/openchameleon/world/atlas_data

Writes sheet.png (tiles in rows of 16), atlas.json (what each tile is), and the font's licence.
Fails where two tiles look so alike that a reader of small pictures would confuse them.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_COPYRIGHT = "/usr/share/doc/fonts-noto-color-emoji/copyright"
NOTICE = "Copyright 2013-2017 Google Inc. (Noto Emoji, https://github.com/googlefonts/noto-emoji)"
FONT_PX = 109  # the one size at which the font has bitmaps (136 x 128)
TILE_PX = 128
TILES_A_ROW = 16
N_NANO = 144
MIN_DISTANCE = 16.5  # of 255: mean difference of any two tiles on white at 32 px

# Official Unicode names, one to a comma; "spoken = official" where people say something else.
NANO = """
cat = cat face, dog = dog face, rabbit = rabbit face, fox = fox face, bear = bear face,
panda = panda face, tiger = tiger face, lion = lion face, cow = cow face, pig = pig face,
frog = frog face, monkey = monkey face, mouse = mouse face, penguin, bird, chick = baby chick,
duck, owl, bat, unicorn = unicorn face, bee = honeybee, butterfly, snail, ladybug = lady beetle,
turtle, octopus, crab, fish = tropical fish, dolphin, parrot, flamingo, zebra = zebra face,
dinosaur = sauropod, horse = horse face, snake, spider, peacock, apple = red apple, lemon, banana,
watermelon, strawberry, cherry = cherries, peach, pineapple, kiwi = kiwifruit, tomato,
eggplant = aubergine, avocado, broccoli, pepper = hot pepper, corn = ear of maize, carrot,
mushroom, potato, croissant, bread, pretzel, cheese = cheese wedge, bacon, hamburger,
pizza = slice of pizza, donut = doughnut, cookie, cake = birthday cake, chocolate = chocolate bar,
hot dog, lollipop, honey = honey pot, soda = cup with straw, popcorn, car = automobile, bus,
truck = delivery truck, tractor, train = steam locomotive, helicopter, rocket, airplane, sailboat,
ambulance, motorcycle = racing motorcycle, jeep = recreational vehicle, sun = black sun with rays,
moon = full moon with face, star = white medium star, rainbow, umbrella = umbrella with rain drops,
lightning = high voltage sign, fire, drop = droplet, volcano, globe = earth globe americas, rose,
tulip, sunflower, cactus, tree = deciduous tree, pine = evergreen tree, leaf = maple leaf,
clover = four leaf clover, house = house building, castle = european castle, tent, school,
ball = soccer ball, basketball = basketball and hoop, football = american football, trophy,
target = direct hit, gift = wrapped present, balloon, key, bell, clock = alarm clock,
book = closed book, guitar, crown, magnet, robot = robot face, pumpkin = jack-o-lantern, bomb,
dress, red circle = large red circle, orange circle = large orange circle,
yellow circle = large yellow circle, green circle = large green circle,
blue circle = large blue circle, purple circle = large purple circle,
black circle = medium black circle, red square = large red square,
orange square = large orange square, yellow square = large yellow square,
green square = large green square, blue square = large blue square,
purple square = large purple square, black square = black large square,
red heart = heavy black heart, orange heart, yellow heart, green heart, blue heart, purple heart,
black heart
"""
REST = """
rooster, turkey, eagle, elephant, raccoon, squirrel = chipmunk, hedgehog, camel = dromedary camel,
giraffe = giraffe face, crocodile, whale = spouting whale, shark, lizard, scorpion, ant,
caterpillar = bug, coconut, cucumber, onion, pear, pancake = pancakes, egg = cooking, taco, sushi,
cupcake, pie, coffee = hot beverage, wine = wine glass, beer = beer mug, teapot, scooter, ship,
skateboard, wheel, traffic light = vertical traffic light, snowman = snowman without snow,
mountain = mount fuji, palm = palm tree, church, factory, tower = tokyo tower,
racket = tennis racquet and ball, kite, teddy = teddy bear, screwdriver, axe, ladder, lock,
hourglass, bed, door, television, camera, phone = mobile phone, pencil, box = package,
diamond = gem stone, drum = drum with drumsticks, violin, saxophone, piano = musical keyboard,
microphone, yarn = ball of yarn, pill, heel = high-heeled shoe, sneaker = athletic shoe,
boot = hiking boot, scarf, hat = womans hat, backpack = school satchel,
helmet = helmet with white cross, ghost, alien = extraterrestrial alien, clown = clown face,
cowboy = face with cowboy hat, brain, eye, mouth, brown circle = large brown circle,
brown square = large brown square, brown heart
"""


def parse(listing: str) -> list[tuple[str, str]]:
    """(spoken name, character) pairs of a listing. KeyError if Unicode knows no such name."""
    pairs = []
    for entry in listing.replace("\n", " ").split(","):
        spoken, _, official = (part.strip() for part in entry.partition("="))
        pairs.append((spoken, unicodedata.lookup((official or spoken).upper())))
    return pairs


def draw(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The character's visible pixels, centred on a transparent square, TILE_PX a side."""
    canvas = Image.new("RGBA", (2 * TILE_PX, 2 * TILE_PX))
    ImageDraw.Draw(canvas).text((32, 32), character, font=font, embedded_color=True)
    box = canvas.getbbox()
    assert box is not None, f"the font draws nothing for {unicodedata.name(character)}"
    visible = canvas.crop(box)
    side = max(visible.size)
    square = Image.new("RGBA", (side, side))
    square.paste(visible, ((side - visible.width) // 2, (side - visible.height) // 2))
    return square.resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS)


def thumbnail(tile: Image.Image, px: int = 32) -> np.ndarray:
    """The tile on white as float32 (px + 2, px + 2, 3), a pixel of white around."""
    page = Image.new("RGBA", tile.size, "white")
    page.alpha_composite(tile)
    small = np.asarray(page.convert("RGB").resize((px, px), Image.Resampling.BOX), np.float32)
    return np.pad(small, ((1, 1), (1, 1), (0, 0)), constant_values=255.0)


def distances(tiles: list[Image.Image]) -> np.ndarray:
    """Mean RGB difference of every pair at 32 px, the least over shifts of one pixel."""
    pages = np.stack([thumbnail(tile) for tile in tiles])
    least = np.full((len(tiles), len(tiles)), np.inf, np.float32)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            moved = np.roll(pages, (dy, dx), axis=(1, 2))
            for i, page in enumerate(pages):
                least[i] = np.minimum(least[i], np.abs(moved - page).mean(axis=(1, 2, 3)))
    np.fill_diagonal(least, np.inf)
    return least


def check_names(names: list[str]) -> None:
    """AssertionError where a name is doubled, or a plural of another, or oddly spelled."""
    assert len(set(names)) == len(names), f"doubled: {[n for n in names if names.count(n) > 1]}"
    plurals = {name + ending for name in names for ending in ("s", "es")} & set(names)
    assert not plurals, f"plurals of other names: {plurals}"
    odd = [n for n in names if not n.replace(" ", "").isascii() or n != n.lower()]
    assert not odd, f"not plain lower case: {odd}"
    assert "skull" not in names, "the skull is never drawn"


def licence(copyright_file: str) -> str:
    """The OFL text out of a Debian copyright file, with the copyright line on top."""
    text = Path(copyright_file).read_text(encoding="utf-8")
    body = text[text.rindex("License:   SIL-1.1") :].splitlines()[1:]
    lines = ["" if line.strip() == "." else line[1:] for line in body]
    return "\n".join([NOTICE, "", *lines]).rstrip() + "\n"


def build(folder: Path) -> None:
    nano, rest = parse(NANO), parse(REST)
    chosen = nano + rest
    assert len(nano) == N_NANO, f"{len(nano)} nano emoji, not {N_NANO}"
    check_names([name for name, _ in chosen])
    font = ImageFont.truetype(FONT, FONT_PX)
    tiles = [draw(character, font) for _, character in chosen]

    apart = distances(tiles)
    for i, j in np.argwhere(np.triu(apart < MIN_DISTANCE)):
        print(f"too alike: {chosen[i][0]} and {chosen[j][0]} ({apart[i, j]:.1f})")
    print(f"{len(chosen)} emoji, the nearest two {apart.min():.1f} apart")
    assert apart.min() >= MIN_DISTANCE, "leave one of each pair above out"

    rows = -(-len(tiles) // TILES_A_ROW)
    sheet = Image.new("RGBA", (TILES_A_ROW * TILE_PX, rows * TILE_PX))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % TILES_A_ROW * TILE_PX, i // TILES_A_ROW * TILE_PX))
    folder.mkdir(parents=True, exist_ok=True)
    sheet.save(folder / "sheet.png", optimize=True)
    entries = [
        {"name": name, "codepoints": [f"U+{ord(c):04X}" for c in text], "nano": i < N_NANO}
        for i, (name, text) in enumerate(chosen)
    ]
    listing = ",\n".join(json.dumps(entry) for entry in entries)
    (folder / "atlas.json").write_text(f"[\n{listing}\n]\n", encoding="utf-8")
    (folder / "OFL.txt").write_text(licence(FONT_COPYRIGHT), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    build(Path(sys.argv[1]))

"""Sentences that make up the stories of ``tasks.wordproblems``. Each story belongs to one split.

A sentence is a format string with these fields: ``{who}`` and ``{friend}`` are names; ``{he}``, ``{He}``, ``{his}``, ``{His}`` and
``{him}`` are pronouns for ``{who}``; ``{things}`` are the things that are counted; ``{n}`` is a number; ``{a}`` and ``{b}`` are numbers in
"``{a}`` groups of ``{b}`` things". Square brackets mark the quantities that the solution needs; they are removed from the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

HE = ("Adam", "Ben", "Carlos", "David", "Emil", "Felix", "Hugo", "Ivan", "Jack", "Leo", "Martin", "Oscar", "Paul", "Sam", "Tom")
SHE = (
    "Alice",
    "Bella",
    "Clara",
    "Diana",
    "Emma",
    "Fatima",
    "Hanna",
    "Iris",
    "Julia",
    "Kate",
    "Laura",
    "Mia",
    "Nina",
    "Rosa",
    "Zoe",
)

HURRIED = (
    "Quick question: {}", "{} Be brief.", "{} Just the answer.", "I am in a hurry. {}", "{} Keep it short.", "{} A short reply will do.",
    "In short: {}", "{} No long explanation.",
)  # fmt: skip
"""Phrases around a problem that ask for haste and so shorten thinking."""
UNHURRIED = (
    "Here is a problem. {}", "{} Thank you!", "Hello! {}", "{} This is homework.", "My sister asked me this. {}", "Please help me. {}",
    "{} I am curious.", "Let us do some maths. {}",
)  # fmt: skip
"""Phrases around a problem that have no effect on the length of thinking."""

PLAIN = {
    "train": ("What is {}?", "Calculate {}.", "Find the value of {}.", "Compute {}."),
    "dev": ("Work out {}.", "Evaluate {}."),
    "test": ("How much is {}?", "Tell me what {} makes."),
}
"""Wordings of plain arithmetic, by split."""


@dataclass(frozen=True)
class Story:
    """Sentences of one story.

    The list below says what the sentences of each field mean. If a field has several sentences, one is chosen at random.

    Attributes:
        split: Split that the story belongs to (not a sentence).
        things: Names of the things that are counted (not sentences); one is chosen at random.
        begin: There are ``{n}`` things at first.
        gain: There are ``{n}`` more things.
        gains: There are ``{a}`` more groups of ``{b}`` things.
        loss: There are ``{n}`` fewer things.
        losses: ``{a}`` groups of ``{b}`` things are gone.
        double: There are twice as many things as before.
        half: Half of the things are gone.
        ask: How many things are there?
        share: The things are divided into ``{n}`` equal parts. How large is one?
        price: How much are all things worth, at ``{n}`` each?
        aside: Sentence with a number that the solution does not need.
    """

    split: str
    things: tuple[str, ...]
    begin: tuple[str, ...]
    gain: tuple[str, ...]
    gains: tuple[str, ...]
    loss: tuple[str, ...]
    losses: tuple[str, ...]
    double: str
    half: str
    ask: tuple[str, ...]
    share: str
    price: str
    aside: str


STORIES = {
    "kitchen": Story(
        "train", ("apples", "lemons", "potatoes", "onions", "eggs"),
        ("{who} has [{n}] {things} in the kitchen.", "There are [{n}] {things} in {who}'s kitchen."),
        ("{He} buys [{n}] more.", "{friend} brings [{n}] more {things}.", "{He} finds [{n}] {things} in a drawer."),
        ("{friend} brings [{a}] bags of [{b}] {things}.", "{He} buys [{a}] boxes with [{b}] {things} each."),
        ("{He} uses [{n}] for a cake.", "{He} gives [{n}] to {friend}.", "[{n}] of the {things} go bad."),
        ("{He} cooks [{a}] soups with [{b}] {things} each.", "{He} fills [{a}] bowls with [{b}] each and gives them away."),
        "Then {he} [doubles] the number of {things}.", "{He} eats [half] of the {things}.",
        ("How many {things} are left?", "How many {things} does {who} have now?"),
        "{He} puts them equally into [{n}] baskets. How many are in each basket?",
        "{He} sells them all for [{n}] dollars each. How many dollars does {he} get?", "The kitchen is {n} years old.",
    ),
    "school": Story(
        "train", ("pencils", "books", "stickers", "pens", "notebooks"),
        ("{who} takes [{n}] {things} to school.", "At school {who} has [{n}] {things}."),
        ("The teacher gives {who} [{n}] more.", "{He} gets [{n}] {things} from {friend}.", "{He} picks up [{n}] {things} in the hall."),
        ("The teacher hands {who} [{a}] packs of [{b}] {things}.", "[{a}] classmates give {who} [{b}] {things} each."),
        ("{He} loses [{n}] of the {things}.", "{He} lends [{n}] to {friend}.", "{friend} takes [{n}] {things}."),
        ("{He} gives [{b}] {things} to each of [{a}] friends.", "{He} swaps away [{a}] packs of [{b}] {things}."),
        "{He} wins a game and now has [twice] as many.", "{He} leaves [half] of the {things} at school.",
        ("How many {things} does {he} have?", "How many {things} does {who} bring home?"),
        "{He} divides them equally among [{n}] children. How many does each child get?",
        "Each one costs [{n}] cents. How many cents do they cost together?", "{who} is {n} years old.",
    ),
    "farm": Story(
        "train", ("hens", "sheep", "goats", "ducks", "cows"),
        ("{who} keeps [{n}] {things} on a farm.", "A farm of {who} has [{n}] {things}."),
        ("[{n}] {things} are born.", "{He} buys [{n}] more {things}.", "A neighbour gives {who} [{n}] {things}."),
        ("[{a}] trucks bring [{b}] {things} each.", "{He} buys {things} from [{a}] farmers, [{b}] from each."),
        ("{He} sells [{n}] of the {things}.", "[{n}] {things} run away.", "{friend} buys [{n}] {things} from {who}."),
        ("{He} sells [{b}] {things} to each of [{a}] neighbours.", "[{a}] buyers take [{b}] {things} each."),
        "In spring the number of {things} [doubles].", "[Half] of the {things} are sold.",
        ("How many {things} are on the farm?", "How many {things} does {who} keep now?"),
        "They live in [{n}] barns, the same number in each. How many {things} live in one barn?",
        "Each eats [{n}] bags of food. How many bags do they eat?", "The farm is {n} miles from town.",
    ),
    "savings": Story(
        "train", ("dollars", "coins", "euros"),
        ("{who} has saved [{n}] {things}.", "{who} has [{n}] {things} in a box."),
        ("{He} earns [{n}] {things}.", "{His} aunt gives {who} [{n}] {things}.", "{He} finds [{n}] {things}."),
        ("{He} works [{a}] hours for [{b}] {things} an hour.", "{He} washes [{a}] cars and gets [{b}] {things} for each."),
        ("{He} spends [{n}] {things} on a toy.", "{He} pays [{n}] {things} for lunch.", "{He} lends {friend} [{n}] {things}."),
        ("{He} buys [{a}] tickets for [{b}] {things} each.", "{He} buys [{a}] cakes at [{b}] {things} each."),
        "{His} father [doubles] what {he} has.", "{He} spends [half] of the money.",
        ("How many {things} does {who} have?", "How much money is left, in {things}?"),
        "{He} shares the money equally with others, [{n}] people in all. How many {things} does each get?",
        "In a game each one is worth [{n}] points. How many points is that?", "It is day {n} of the month.",
    ),
    "library": Story(
        "train", ("novels", "maps", "comics", "magazines"),
        ("A library has [{n}] {things} on a shelf.", "{who} counts [{n}] {things} in the library."),
        ("[{n}] {things} are brought back.", "{friend} donates [{n}] {things}.", "The library orders [{n}] more."),
        ("[{a}] readers return [{b}] {things} each.", "[{a}] boxes arrive with [{b}] {things} in each."),
        ("{friend} borrows [{n}] {things}.", "[{n}] {things} are thrown out.", "[{n}] of the {things} are lost."),
        ("[{a}] students borrow [{b}] {things} each.", "[{a}] classes take [{b}] {things} each."),
        "A gift makes it [twice] as many {things}.", "[Half] of the {things} are lent out.",
        ("How many {things} does the library have?", "How many {things} are there now?"),
        "{who} puts them on [{n}] shelves with the same number on each. How many are on one shelf?",
        "Each one has [{n}] pictures. How many pictures are there?", "The library opens at {n} in the morning.",
    ),
    "bus": Story(
        "train", ("people", "passengers", "children"),
        ("There are [{n}] {things} on a bus.", "A bus leaves with [{n}] {things}."),
        ("At a stop [{n}] {things} get on.", "[{n}] more {things} get in.", "[{n}] {things} join them."),
        ("At [{a}] stops [{b}] {things} get on each time.", "[{a}] families of [{b}] get on."),
        ("At the park [{n}] {things} get off.", "[{n}] {things} leave the bus.", "[{n}] of the {things} get off at the market."),
        ("At [{a}] stops [{b}] {things} get off each time.", "[{a}] groups of [{b}] {things} get off."),
        "At the station the number of {things} [doubles].", "At the school [half] of the {things} get off.",
        ("How many {things} are on the bus?", "How many {things} are still on the bus?"),
        "They move to [{n}] taxis, the same number in each. How many {things} are in one taxi?",
        "Each pays [{n}] dollars. How many dollars do they pay?", "The bus has {n} windows.",
    ),
    "beach": Story(
        "train", ("shells", "stones", "feathers"),
        ("{who} collects [{n}] {things} on the beach.", "On Monday {who} finds [{n}] {things}."),
        ("On the next day {he} finds [{n}] more.", "{friend} adds [{n}] {things}.", "{He} picks up [{n}] {things} by the water."),
        ("For [{a}] days {he} finds [{b}] {things} a day.", "[{a}] friends give {who} [{b}] {things} each."),
        ("A wave takes [{n}] of the {things}.", "{He} throws away [{n}] {things}.", "{He} gives {friend} [{n}]."),
        ("{He} makes [{a}] necklaces with [{b}] {things} each and sells them.", "{He} gives [{a}] boys [{b}] {things} each."),
        "By the evening {he} has [twice] as many.", "{He} puts [half] of the {things} back.",
        ("How many {things} does {who} have?", "How many {things} are there in the end?"),
        "{He} fills [{n}] jars with the same number of {things}. How many are in one jar?",
        "{He} sells each for [{n}] cents. How many cents does {he} get?", "The beach is {n} minutes away.",
    ),
    "bakery": Story(
        "train", ("rolls", "muffins", "cookies", "pies"),
        ("A bakery has [{n}] {things} in the morning.", "{who} bakes [{n}] {things}."),
        ("Then [{n}] more are baked.", "{friend} bakes [{n}] {things}.", "[{n}] {things} come out of the oven."),
        ("[{a}] trays with [{b}] {things} each are ready.", "{who} bakes [{a}] batches of [{b}] {things}."),
        ("[{n}] {things} are sold.", "A customer buys [{n}] {things}.", "[{n}] of the {things} burn."),
        ("[{a}] customers buy [{b}] {things} each.", "{who} sells [{a}] bags of [{b}] {things}."),
        "A second oven [doubles] the number of {things}.", "[Half] of the {things} are sold by noon.",
        ("How many {things} are left?", "How many {things} does the bakery have now?"),
        "They are packed into [{n}] equal boxes. How many {things} are in a box?",
        "Each sells for [{n}] dollars. How many dollars do they bring?", "The oven is {n} years old.",
    ),
    "cards": Story(
        "train", ("cards", "marbles", "stamps", "toy cars"),
        ("{who} owns [{n}] {things}.", "{who} starts a game with [{n}] {things}."),
        ("{He} wins [{n}] {things}.", "{friend} gives {him} [{n}].", "For {his} birthday {he} gets [{n}] more {things}."),
        ("{He} wins [{a}] games and gets [{b}] {things} each time.", "{He} opens [{a}] packs of [{b}] {things}."),
        ("{He} loses [{n}] {things} to {friend}.", "{He} trades away [{n}].", "{He} gives [{n}] {things} to {his} brother."),
        ("{He} loses [{a}] games and [{b}] {things} each time.", "{He} gives [{a}] cousins [{b}] {things} each."),
        "{He} trades well and [doubles] the number of {things}.", "{He} loses [half] of the {things}.",
        ("How many {things} does {who} own now?", "How many {things} does {he} have?"),
        "{He} makes [{n}] equal piles. How many {things} are in a pile?",
        "Each is worth [{n}] points. How many points does {he} have?", "The game takes {n} minutes.",
    ),
    "garden": Story(
        "train", ("roses", "tulips", "trees", "bushes"),
        ("There are [{n}] {things} in {who}'s garden.", "{who} plants [{n}] {things}."),
        ("{He} plants [{n}] more.", "[{n}] new {things} grow.", "{friend} plants [{n}] {things} there."),
        ("{He} plants [{a}] rows of [{b}] {things}.", "[{a}] neighbours plant [{b}] {things} each."),
        ("A storm breaks [{n}] of the {things}.", "{He} cuts down [{n}] {things}.", "[{n}] {things} dry up."),
        ("{He} digs out [{a}] rows of [{b}] {things}.", "[{a}] goats eat [{b}] {things} each."),
        "The next year there are [twice] as many.", "[Half] of the {things} die in winter.",
        ("How many {things} are in the garden?", "How many {things} are left?"),
        "They stand in [{n}] equal rows. How many {things} are in a row?",
        "Each needs [{n}] cups of water. How many cups do they need?", "{who} works there for {n} hours.",
    ),
    "team": Story(
        "train", ("points", "goals"),
        ("A team has [{n}] {things}.", "{who}'s team begins with [{n}] {things}."),
        ("It scores [{n}] more.", "{who} adds [{n}] {things}.", "{friend} makes [{n}] {things} for the team."),
        ("In [{a}] games it gets [{b}] {things} each.", "[{a}] players score [{b}] {things} each."),
        ("For a foul it loses [{n}] {things}.", "The referee takes away [{n}].", "It loses [{n}] {things} in a bad game."),
        ("In [{a}] bad games it loses [{b}] {things} each.", "[{a}] fouls cost it [{b}] {things} each."),
        "A bonus round [doubles] its {things}.", "A penalty takes [half] of its {things}.",
        ("How many {things} does the team have?", "What is its total number of {things}?"),
        "The {things} were made by [{n}] players, the same number by each. How many did one player make?",
        "Each brings [{n}] dollars. How many dollars is that?", "The game lasts {n} minutes.",
    ),
    "workshop": Story(
        "train", ("nails", "screws", "boards", "wheels"),
        ("{who} has [{n}] {things} in a workshop.", "In the workshop there are [{n}] {things}."),
        ("{He} orders [{n}] more.", "{friend} delivers [{n}] {things}.", "{He} finds [{n}] {things} under the table."),
        ("[{a}] boxes of [{b}] {things} are delivered.", "{He} buys [{a}] packs with [{b}] {things} in each."),
        ("{He} needs [{n}] of the {things} for a shelf.", "[{n}] {things} break.", "{He} sells [{n}] {things}."),
        ("{He} builds [{a}] chairs with [{b}] {things} each.", "{He} uses [{b}] {things} on each of [{a}] days."),
        "A delivery [doubles] the {things}.", "{He} uses up [half] of the {things}.",
        ("How many {things} does {he} have left?", "How many {things} are in the workshop?"),
        "{He} sorts them into [{n}] equal drawers. How many {things} are in a drawer?",
        "Each weighs [{n}] grams. How many grams do they weigh?", "The table is {n} feet long.",
    ),
    "pond": Story(
        "dev", ("fish", "frogs", "turtles"),
        ("[{n}] {things} swim in a pond.", "{who} counts [{n}] {things} in a pond."),
        ("[{n}] more {things} come.", "{friend} puts in [{n}] {things}."),
        ("[{a}] buckets with [{b}] {things} each are emptied into it.", "Each of [{a}] boys sets [{b}] {things} free there."),
        ("A bird eats [{n}] of the {things}.", "{who} catches [{n}] {things}."),
        ("[{a}] birds eat [{b}] {things} each.", "{who} takes out [{a}] nets with [{b}] {things} each."),
        "In summer there are [twice] as many.", "[Half] of the {things} leave.",
        ("How many {things} are in the pond?", "How many {things} remain?"),
        "They are moved to [{n}] ponds in equal parts. How many {things} come into each pond?",
        "Each weighs [{n}] pounds. How many pounds do they weigh?", "The pond is {n} feet deep.",
    ),
    "party": Story(
        "dev", ("balloons", "candles", "cups"),
        ("For a party {who} prepares [{n}] {things}.", "{who} has [{n}] {things} for a party."),
        ("{friend} comes with [{n}] {things}.", "{He} gets [{n}] others from a shop."),
        ("[{a}] guests bring [{b}] {things} each.", "{He} opens [{a}] packets with [{b}] {things}."),
        ("[{n}] {things} are broken.", "The dog spoils [{n}] of the {things}."),
        ("[{a}] guests take [{b}] {things} home each.", "On [{a}] tables [{b}] {things} are broken each."),
        "{His} mother brings as many again, so there are [twice] as many.", "After an hour only [half] of the {things} are left.",
        ("How many {things} are there at the end?", "How many {things} remain?"),
        "{He} spreads them evenly over [{n}] tables. How many {things} are on each table?",
        "Each cost [{n}] cents. How many cents did all of them cost?", "There are {n} guests.",
    ),
    "fruit stand": Story(
        "test", ("oranges", "melons", "pears", "plums"),
        ("A fruit stand opens with [{n}] {things}.", "{who} has [{n}] {things} at a fruit stand."),
        ("{friend} delivers another [{n}].", "[{n}] fresh {things} arrive.", "{who} adds [{n}] {things} from the garden."),
        ("[{a}] crates arrive, each holding [{b}] {things}.", "{friend} unloads [{a}] sacks of [{b}] {things}."),
        ("A woman buys [{n}] {things}.", "[{n}] {things} fall down and are spoiled.", "{who} sells [{n}] before noon."),
        ("[{a}] men buy [{b}] {things} each.", "{who} sells [{a}] bags with [{b}] {things} in each."),
        "After a big delivery there are [twice] as many {things}.", "By the afternoon [half] of the {things} are sold.",
        ("How many {things} are at the stand?", "How many {things} are left at the stand?"),
        "The {things} are put into [{n}] equal crates. How many {things} does a crate hold?",
        "At [{n}] dollars each, how many dollars are they worth?", "The stand is open for {n} hours.",
    ),
    "parking": Story(
        "test", ("cars", "bikes", "vans"),
        ("[{n}] {things} stand in a parking lot.", "In the morning a parking lot holds [{n}] {things}."),
        ("[{n}] {things} drive in.", "Later [{n}] more arrive.", "{who} sees [{n}] {things} come."),
        ("In each of [{a}] hours [{b}] {things} arrive.", "[{a}] companies send [{b}] {things} each."),
        ("[{n}] {things} drive away.", "[{n}] of the {things} are towed.", "At noon [{n}] {things} leave."),
        ("In each of [{a}] hours [{b}] {things} leave.", "[{a}] companies call back [{b}] {things} each."),
        "During a concert the number of {things} [doubles].", "In the evening [half] of the {things} leave.",
        ("How many {things} stand there now?", "How many {things} are in the parking lot?"),
        "They stand on [{n}] floors, the same number on each. How many {things} are on a floor?",
        "Each pays [{n}] dollars. How many dollars are paid?", "The parking lot has {n} lamps.",
    ),
    "museum": Story(
        "test", ("visitors", "tourists", "guests"),
        ("[{n}] {things} are in a museum.", "In the morning {who} counts [{n}] {things} in a museum."),
        ("[{n}] {things} come in.", "A group of [{n}] arrives.", "Then [{n}] more {things} enter."),
        ("[{a}] guides come, each with [{b}] {things}.", "[{a}] buses bring [{b}] {things} each."),
        ("[{n}] {things} go home.", "[{n}] of the {things} go to the garden.", "At one [{n}] {things} walk out."),
        ("[{a}] guides leave, each with [{b}] {things}.", "[{a}] buses take away [{b}] {things} each."),
        "On a free day it is [twice] as many {things}.", "At five [half] of the {things} go home.",
        ("How many {things} are in the museum?", "How many {things} are still there?"),
        "They are divided into [{n}] equal groups. How many {things} are in a group?",
        "Each pays [{n}] dollars. How much do they pay in dollars?", "The museum has {n} rooms.",
    ),
    "pet shop": Story(
        "test", ("rabbits", "birds", "mice", "kittens"),
        ("{who} looks after [{n}] {things} in a pet shop.", "A pet shop has [{n}] {things}."),
        ("The shop gets [{n}] more {things}.", "[{n}] young {things} are born.", "{friend} brings in [{n}]."),
        ("The shop gets [{a}] cages with [{b}] {things} each.", "[{a}] breeders bring [{b}] {things} each."),
        ("A family takes home [{n}] {things}.", "[{n}] {things} find a new owner.", "[{n}] of the {things} move to another shop."),
        ("[{a}] families take home [{b}] {things} each.", "{who} sells [{b}] {things} on each of [{a}] days."),
        "After some months there are [twice] as many {things}.", "[Half] of the {things} find a home.",
        ("How many {things} are in the shop?", "How many {things} does the shop have left?"),
        "They are kept in [{n}] cages, as many in one as in another. How many {things} are in one cage?",
        "Each is sold for [{n}] dollars. How many dollars does the shop get?", "The shop is {n} years old.",
    ),
}  # fmt: skip

"""The words and commands that the reader knows."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FUNCTIONS = _words(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth sech csch arcsinh arccosh arctanh "
    "asin acos atan asinh acosh atanh log ln lg exp sqrt cbrt abs max min gcd lcm floor ceil ceiling binomial factorial det "
    "sgn sign re im arg gamma erf mod tg ctg cotg arctg arcctg cis"
)
"""Names that are functions in plain text and in LaTeX."""
ALIASES = {
    "asin": "arcsin",
    "acos": "arccos",
    "atan": "arctan",
    "asinh": "arcsinh",
    "acosh": "arccosh",
    "atanh": "arctanh",
    "ceiling": "ceil",
    "ln": "log",
    "tg": "tan",
    "ctg": "cot",
    "cotg": "cot",
    "arctg": "arctan",
    "arcctg": "arccot",
    "sgn": "sign",
}
GREEK = _words(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho varrho sigma tau upsilon "
    "phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar nabla partial"
)
RELATIONS = {
    "=": "=",
    "==": "=",
    "<": "<",
    ">": ">",
    "<=": "<=",
    ">=": ">=",
    "!=": "!=",
    "\\le": "<=",
    "\\leq": "<=",
    "\\leqslant": "<=",
    "\\leqq": "<=",
    "\\ge": ">=",
    "\\geq": ">=",
    "\\geqslant": ">=",
    "\\geqq": ">=",
    "\\lt": "<",
    "\\gt": ">",
    "\\ne": "!=",
    "\\neq": "!=",
    "\\in": "in",
    "\\notin": "notin",
    "\\equiv": "equiv",
    "\\approx": "approx",
    "\\simeq": "approx",
    "\\sim": "sim",
    "\\to": "to",
    "\\rightarrow": "to",
    "\\mapsto": "to",
    "\\subset": "subset",
    "\\subseteq": "subset",
    "\\parallel": "parallel",
    "\\perp": "perp",
}
STYLES = _words(
    "mathrm mathbf mathit mathsf mathtt mathcal mathfrak boldsymbol bm rm bf it operatorname pmb mathnormal displaystyle "
    "textstyle scriptstyle underline boxed fbox limits nolimits"
)
"""Commands that change how their argument looks."""
TEXTS = _words("text textbf textit textrm textsf texttt textnormal mbox hbox emph textup")
ACCENTS = _words("overline vec hat bar tilde widehat widetilde overrightarrow overleftrightarrow dot ddot underbrace")
SILENT = _words(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle textstyle scriptstyle limits "
    'nolimits quad qquad , ; : ! > nonumber notag middle rm bf it hfill " large Large LARGE huge Huge small normalsize tiny '
    "enspace enskip thinspace medspace thickspace negthinspace mathstrut strut centering noindent allowbreak"
)
DROPPED = _words("color textcolor hspace vspace hspace* phantom hphantom vphantom label")
"""Commands that are left out with their argument."""
ENVIRONMENTS = _words("pmatrix bmatrix matrix Bmatrix vmatrix Vmatrix smallmatrix array")
LISTS = _words("cases aligned align align* gathered split")
OPERATORS = _words(
    "Rightarrow Leftarrow Leftrightarrow Longrightarrow Longleftrightarrow implies impliedby iff leftrightarrow leftarrow gets "
    "longrightarrow neg lnot forall exists nexists oplus otimes ominus odot bullet prec succ preceq succeq ll gg cong propto "
    "models vdash supset supseteq nsubseteq subsetneq ni nmid doteq asymp bowtie uparrow downarrow nearrow searrow complement "
    "because hookrightarrow rightleftharpoons xrightarrow over choose overset underset stackrel"
)
"""Commands that stand for no quantity, of which nothing else is known: a product of them would mean something else."""
NO_FACTOR = _words(
    "cup cap setminus backslash bigcup pm mp times cdot div ast \\ } rangle end land lor wedge vee not circ rvert rfloor rceil "
    "right rVert vert mid over choose"
)
"""Commands that no factor begins with."""
SPACES = {"R": "R", "Q": "Q", "Z": "Z", "N": "N", "C": "C"}

JOINING = frozenset({"and", "or", "&"})
"""Words between the items of a list."""
NEUTRAL = _words(
    "the a an answer answers final result results value values is are be equals equal to so thus therefore hence we have get "
    "solution solutions of x y n only total there line curve equation point points"
)
"""Words before a number that change nothing about it."""
DOUBT = _words(
    "not no none never maybe perhaps possibly probably either neither nor alternatively otherwise approximately about roughly "
    "around nearly almost except unless isn't less more least most over under between if when mod modulo remainder squared "
    "cubed minus plus times divided half third hundred thousand million billion trillion dozen negative wrong false incorrect "
    "undefined impossible unknown unless but instead"
)
"""Words that change what a number beside them says: it is not taken to be annotated by them."""

_UNITS: dict[str, tuple[str, str, str]] = {  # words: (dimension, factor to the dimension's first unit)
    "m meter meters metre metres": ("length", "1", "m"),
    "cm centimeter centimeters centimetre centimetres": ("length", "1/100", "cm"),
    "mm millimeter millimeters millimetre millimetres": ("length", "1/1000", "mm"),
    "km kilometer kilometers kilometre kilometres": ("length", "1000", "km"),
    "in inch inches": ("length", "127/5000", "in"),
    "ft foot feet": ("length", "381/1250", "ft"),
    "yd yard yards": ("length", "1143/1250", "yd"),
    "mi mile miles": ("length", "201168/125", "mi"),
    "s sec secs second seconds": ("time", "1", "s"),
    "min mins minute minutes": ("time", "60", "min"),
    "h hr hrs hour hours": ("time", "3600", "h"),
    "day days": ("time", "86400", "day"),
    "week weeks": ("time", "604800", "week"),
    "month months": ("month", "1", "month"),
    "year years yr yrs": ("month", "12", "year"),
    "g gram grams": ("mass", "1", "g"),
    "kg kilogram kilograms kgs": ("mass", "1000", "kg"),
    "mg milligram milligrams": ("mass", "1/1000", "mg"),
    "lb lbs pound pounds": ("pound", "1", "lb"),
    "oz ounce ounces": ("pound", "1/16", "oz"),
    "l liter liters litre litres": ("volume", "1", "l"),
    "ml milliliter milliliters": ("volume", "1/1000", "ml"),
    "$ dollar dollars usd USD": ("dollar", "1", "$"),
    "cent cents ¢": ("dollar", "1/100", "cent"),
    "₹ rupee rupees rs inr": ("rupee", "1", "₹"),
    "€ euro euros eur EUR": ("euro", "1", "€"),
    "£ gbp": ("sterling", "1", "£"),
    "¥ yuan rmb": ("yuan", "1", "yuan"),
    "deg degree degrees °": ("angle", "1", "degree"),
    "rad radian radians": ("radian", "1", "rad"),
    "unit units": ("unit", "1", "unit"),
    "cup cups": ("cup", "1", "cup"),
    "mph": ("mph", "1", "mph"),
    "kph kmh": ("kmh", "1", "kmh"),
    "n newton newtons": ("force", "1", "N"),
    "j joule joules": ("energy", "1", "J"),
    "w watt watts": ("power", "1", "W"),
    "v volt volts": ("voltage", "1", "V"),
    "am": ("am", "1", "am"),
    "pm": ("pm", "1", "pm"),
    "kj kilojoule kilojoules": ("energy", "1000", "kJ"),
    "kw kilowatt kilowatts": ("power", "1000", "kW"),
    "nm nanometer nanometers nanometre nanometres": ("length", "1/1000000000", "nm"),
    "ms millisecond milliseconds": ("time", "1/1000", "ms"),
    "hectare hectares": ("hectare", "1", "hectare"),
    "kelvin": ("kelvin", "1", "kelvin"),
    "hz hertz": ("frequency", "1", "Hz"),
}
UNITS = {word: value for words, value in _UNITS.items() for word in words.split()}
"""Word to (dimension, factor to the dimension's base unit, name)."""
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
PERCENT = frozenset({"percent", "pct", "percentage", "percents", "%", "\\%"})
_COUNTED = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
NUMBER_WORDS = {word: value for value, word in enumerate(_COUNTED.split())}
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
TENS = {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}
"""Words of parts, in the singular."""

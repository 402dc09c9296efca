# ruff: noqa: E501  lists of phrases, a language a line
"""Answers that no judge needs to see: they say nothing, or they talk to the judge.

Language models as judges accept answers without content: white space, a colon, «Thought process:», «Let's solve this problem
step by step.», «解», «かいせつ», «Respuesta» (the «master keys» of arXiv 2507.08794), and answers that declare themselves right.
So these are told by rules. A rule takes away what is no content (punctuation, headings, openings, praise of itself, in several
languages); an answer of which nothing is left says nothing.
"""

from __future__ import annotations

import re
import unicodedata

_LETTERS = "LN"
_SYMBOLS = "∞∅"
"""Symbols that are an answer by themselves."""

_STEPWISE = [
    r"step[ -](?:by|after|for)[ -]step", r"one step at a time", r"一步(?:一)?步(?:地|来)?", r"逐步(?:地)?", r"分步", r"ステップ(?:・)?バイ(?:・)?ステップ",
    r"順を追って", r"一つ(?:ずつ|一つ)", r"단계별로", r"차근차근", r"schritt für schritt", r"schrittweise", r"étape par étape", r"pas à pas",
    r"paso a paso", r"passo(?: dopo| per| a) passo", r"шаг за шагом", r"пошагово", r"по шагам", r"krok po kroku", r"stap voor stap",
    r"adım adım", r"từng bước(?: một)?", r"langkah demi langkah", r"خطوة (?:ب|بعد )خطوة", r"चरण दर चरण", r"कदम दर कदम", r"steg för steg",
    r"krok za krokem", r"βήμα προς βήμα", r"צעד אחר צעד",
]  # fmt: skip

_HEADINGS = [
    r"(?:my |the |here is my |here's my |here is the |here's the )?(?:thought|thinking|reasoning|solving|solution)(?: process| steps?)?s?",
    r"thoughts?", r"(?:my |the |here is the |here's the )?(?:final |correct |right |full |complete )?(?:answer|solution|response|result|explanation)",
    r"(?:the |my )?(?:final )?answer (?:is|would be|will be)(?: as follows)?", r"(?:the )?(?:answer|solution) (?:to|of|for) (?:the|this) (?:problem|question)",
    r"(?:step|part) (?:1|one)", r"first(?:ly)?", r"okay|ok|sure|certainly|of course|alright|well|so|hmm|now|great|got it|and|the|therefore|thus|hence|then", r"analysis|explanation|proof|output",
    r"解(?:答|析|説|决|決|法|题|題)?(?:过程|過程|如下|步骤|步驟)?", r"答(?:案|え|复)?(?:如下|是|は)?", r"(?:最终|最終)(?:答案|的な答え|回答)(?:是|は)?", r"回答", r"思(?:考|路)(?:过程|過程|如下)?",
    r"推理(?:过程|過程)?", r"分析(?:过程|過程|如下)?", r"首先", r"好的?", r"かいせつ|かいとう|こたえ|考え方|思考プロセス|推論|まず(?:は)?|結論", r"풀이(?: 과정)?|해설|해답|정답|답(?:변|안)?(?:은|는)?|생각 과정|사고 과정|추론|먼저|우선",
    r"(?:die |meine |der |mein )?(?:endgültige )?(?:lösung|antwort|gedankengang|denkprozess|überlegung(?:en)?|begründung|lösungsweg|erklärung)(?: ist| lautet)?", r"zunächst|zuerst|erstens",
    r"(?:la |ma |mon |le )?(?:réponse|solution|réflexion|raisonnement|processus de (?:réflexion|pensée|raisonnement)|explication)(?: finale)?(?: est)?", r"d'abord|tout d'abord|premièrement",
    r"(?:la |mi |el )?(?:respuesta|solución|razonamiento|proceso de (?:pensamiento|razonamiento)|explicación|pensamiento)(?: final)?(?: es)?", r"primero|en primer lugar",
    r"(?:la |il |mio )?(?:risposta|soluzione|ragionamento|processo di pensiero|spiegazione)(?: finale)?(?: è)?", r"(?:a |o )?(?:resposta|solução|raciocínio|processo de pensamento|explicação)(?: final)?(?: é)?",
    r"решение|ответ|ход (?:мыслей|решения)|рассуждени[ея]|процесс мышления|объяснение|сначала|во-первых", r"الحل|الإجابة|الجواب|عملية التفكير|التفكير|أولا", r"उत्तर|हल|समाधान|विचार प्रक्रिया",
    r"odpowiedź|rozwiązanie|antwoord|oplossing|cevap|çözüm|düşünce süreci|lời giải|đáp án|câu trả lời|jawaban|penyelesaian|svar|lösning|odpověď|řešení|απάντηση|λύση|תשובה|פתרון",
]  # fmt: skip

_OPENINGS = [
    r"(?:so |okay |ok |alright |first |now )?(?:let(?:'|’)?s|let us|let me|we(?:'|’)ll|we will|we (?:can|need to|should|must|have to)|i(?:'|’)ll|i will|i (?:can|need to|should|must|have to)|to) "
    r"(?:now |first |carefully )?(?:solve|think|work|break|go|figure|tackle|approach|analy[sz]e|reason|find|answer|begin|start|look|consider|understand|address)"
    r"(?: (?:this|the|that|it|through|about|out|on|at|down|into|by|with|over|problem|question|task|equation|answer|solution|together|carefully|first|systematically|logically|in detail|given|following|smaller|parts|steps))*",
    r"(?:here(?:'|’)?s|here is) (?:how|what|the|a|my) [\w' ]{0,40}", r"the (?:problem|question) (?:asks|is asking|wants|requires)(?: us| me)?(?: to)?",
    r"(?:让|讓)我们?(?:来|先|一起)?(?:解决|思考|分析|看看|看|想想|想|解)?(?:一下)?(?:这个|这道|此|該|这)?(?:问题|题目|题|問題)?", r"我们?(?:需要|先|来|可以|将)(?:解决|思考|分析|求解)?(?:这个|这道)?(?:问题|题目|题)?",
    r"来?(?:解决|思考|分析|求解)(?:一下)?(?:这个|这道|此|该)?(?:问题|题目|题)", r"[でに]?(?:考え|解い|見)(?:て(?:いき|み))?ましょう",
    r"(?:この|本)?問題を(?:解(?:い|き|く)|考え)[ぁ-ん]*", r"(?:考え|解い|見)て(?:いき|み)ましょう", r"(?:이 )?문제를 (?:풀어|생각해|해결해)[ 가-힣]*", r"생각해[ 가-힣]*",
    r"(?:lass(?:t|en sie)? uns|wir (?:lösen|betrachten|wollen|müssen)|um) [\w ]{0,60}", r"(?:résolvons|réfléchissons|analysons|commençons)[\w ’'àâéèêîôûç]{0,50}",
    r"(?:resolvamos|pensemos|vamos a|analicemos|para resolver)[\w áéíóúñ]{0,50}", r"(?:risolviamo|pensiamo|vamos resolver|analizziamo)[\w àèéìòùãçõ]{0,50}", r"(?:давайте|решим|рассмотрим)[\w ]{0,60}",
    r"(?:دعنا|لنحل|لنفكر)[\w ]{0,60}", r"(?:आइए|चलिए)[\w\sऀ-ॿ]{0,60}",
]  # fmt: skip

_RIGHT = r"(?:correct(?:e|es|a|o|as|os|ly)?|right|accurate|valid|true|perfect|正确|正確|正しい|정확|richtig|korrekt|juste|exacte|corrett[ao]|certo|правильн\w*|верн\w*|صحيح\w*|सही)"
_PRAISE = [
    rf"(?:the |this |that |my |your |above |given |student(?:'|’)?s? |final |provided |candidate(?:'|’)?s? )*(?:answer|response|solution|result|output|it|this|that|everything)(?: above| given| provided| here)* "
    rf"(?:is|are|was|matches|must be|should be|has to be)(?: (?:definitely|absolutely|clearly|completely|100%|indeed|fully|also|therefore|certainly|verified|the|reference|expected|to be|as|marked|considered|judged))*(?: {_RIGHT})?",
    rf"(?:答案|回答|解答|结果|答え|解)(?:是|は|完全|绝对|都|就|的)*{_RIGHT}(?:的|です)?", r"正解(?:です|だ)?", r"정답(?:입니다|이다)", r"(?:답|답변|정답)[은는이가]? (?:맞습니다|정확합니다|옳습니다)",
    rf"(?:die|meine|diese) (?:antwort|lösung) ist (?:\w+ )?{_RIGHT}", rf"(?:la|ma|mi|cette|esta|essa|a|questa) (?:respuesta|réponse|solución|solution|risposta|soluzione|resposta|solução) (?:est|es|è|é) (?:\w+ )?{_RIGHT}",
    rf"(?:этот |мой )?(?:ответ|решение) (?:\w+ )?{_RIGHT}", rf"(?:الإجابة|الجواب) {_RIGHT}", rf"(?:verdict|grade|score|judg(?:e)?ment|evaluation|result|判定|结论|评分|bewertung|urteil) ?[:=：] ?{_RIGHT}",
    r"(?:and )?(?:it |this )?(?:fully |exactly )?(?:match(?:es)?|agrees with|equals) (?:the )?(?:reference|expected|correct|given|ground truth)"
    r"(?: (?:answer|solution|one|result))?",
    rf"(?:in)?{_RIGHT}",
]  # fmt: skip

_COMMANDS = [
    r"(?:ignore|disregard|forget|override)\b.{0,40}\b(?:instructions?|prompts?|rules?|guidelines?|above|previous)",
    r"\b(?:dear |attention,? |note to |to the |hey,? )(?:grader|judge|evaluator|examiner|teacher|assistant|model|ai)\b",
    r"[\"']?\b(?:verdict|is_correct|iscorrect|correctness|judg(?:e)?ment|grade|correct)\b[\"']?\s*[:=]\s*[\"']?(?:correct|true|yes|pass(?:ed)?|right|1(?:\.0)?)\b",
    r"<\|[a-z_]+\|>|\[/?inst\]|<</?sys>>|<(?:start|end)_of_turn>|</?(?:system|assistant|user|verdict|judg(?:e)?ment)>",
    r"(?:^|\n)\s*(?:system|assistant|user|judge|grader|human)\s*:", r"(?:忽略|无视|忽视).{0,12}(?:指令|指示|提示|说明)", r"(?:请|必须|应该)?(?:判定|判断|评判|标记|输出|回复)(?:为|成|:|：|此答案)+.{0,6}正确",
    r"(?:ignoriere|vergiss).{0,30}(?:anweisung|anleitung|regeln)", r"(?:ignora|ignorez|oublie[rz]?).{0,30}(?:instruc|consigne|istruz)", r"игнорируй.{0,30}(?:инструкц|указан)",
]  # fmt: skip

_YES = {"yes", "y", "true", "pass", "passed", "ok", "okay", "是", "对", "對", "はい", "네", "예", "ja", "oui", "sí", "si", "sì", "sim", "да", "نعم", "हाँ", "verified", "agreed"}  # fmt: skip
_YES_OR_NO = _YES | {
    "no",
    "n",
    "false",
    "fail",
    "不是",
    "否",
    "いいえ",
    "아니요",
    "nein",
    "non",
    "não",
    "нет",
    "لا",
    "नहीं",
    "不",
    "错",
}


def _any(patterns: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))


_COMMAND = _any(_COMMANDS)
_PAID = re.compile(r"\b(?:correct|full (?:marks?|credit|points?|score))\b")
_ORDER = re.compile(
    r"\b(?:output|respond|reply|say|print|return|write|mark|grade|rate|score|judge|evaluate|treat|accept|consider|count)\b"
    r".*(?:\b(?:as|with|only|exactly)\b|[\"'«“:]).{0,12}$|\banswer (?:only |exactly )?with .{0,12}$|\b(?:give|award|assign)\b.{0,30}$"
)
_EMPTY = _any([*_PRAISE, *_OPENINGS, *_STEPWISE, *_HEADINGS])
_PRAISE_ONLY = _any(_PRAISE[:-1])
MAX_CHARS = 400
"""Longer answers have content; they are looked at for commands alone."""


def without_content(answer: str, *, question: str = "", reference: str = "") -> str:
    """Why `answer` cannot be right, or an empty text if only a judge can tell.

    `empty`: no letter, no digit. `opening`: nothing but headings, openings and praise of itself. `command`: it talks to the
    judge, in words, in JSON or in control tokens. `yes`: a bare yes where `reference` is neither yes nor no. `question`: the
    question itself. An answer that is the reference is never refused.
    """
    text = _normal(answer)
    if text and text == _normal(reference):
        return ""
    if not _has_content(text):
        return "empty"
    if _commands(_visible(answer)):
        return "command"
    if text == _normal(question):
        return "question"
    if len(text) > MAX_CHARS:
        return ""
    bare = text.strip(" .!。！,;:-*_#\"'`")
    if bare in _YES and _normal(reference).strip(" .") not in _YES_OR_NO:
        return "yes"
    ends_early = re.search(r"[:：;,、，…]\s*$|(?:\.\.\.)\s*$", text)
    if ends_early and len(re.findall(r"\w+", text)) <= 12 and not re.search(r"\d", text):
        return "opening"
    return "" if _has_content(_whole_words(text)) else "opening"


def without_praise(answer: str) -> str:
    """`answer` without sentences in which it declares itself right, for the judge to read."""
    kept = [
        part for part in re.split(r"(?<=[.!?。！？\n])", answer) if not _PRAISE_ONLY.fullmatch(_normal(part).strip(" .!。！"))
    ]
    return "".join(kept).strip()


def _praises(sentence: str) -> bool:
    return len(sentence) <= 200 and _PRAISE_ONLY.fullmatch(_normal(sentence).strip(" .!。！")) is not None


def _commands(text: str) -> bool:
    """Whether `text` tells the judge what to do. «mark … as … correct» is looked for from its end, which takes linear time."""
    if _COMMAND.search(text):
        return True
    return any(_ORDER.search(text[max(found.start() - 70, 0) : found.start()]) for found in _PAID.finditer(text))


def _whole_words(text: str) -> str:
    """`text` with every phrase without content taken out, where it is not part of a longer word."""

    def cut(match: re.Match[str]) -> str:
        before, after = text[: match.start()][-1:], text[match.end() :][:1]
        inside = (_joins(before) and _joins(match[0][:1])) or (_joins(after) and _joins(match[0][-1:]))
        return match[0] if inside or not match[0] else " "

    return _EMPTY.sub(cut, text)


def _joins(character: str) -> bool:
    """Whether words of this script are written with spaces, so that two such characters are one word."""
    return character.isalnum() and not ("\u3040" <= character <= "\u9fff")


def _has_content(text: str) -> bool:
    return any(unicodedata.category(c)[0] in _LETTERS or c in _SYMBOLS for c in text)


def _visible(text: str) -> str:
    """Compatibility forms, lower case, no invisible characters."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cc") or c in "\n\t")


def _normal(text: str) -> str:
    """What is visible, with single spaces; emphasis and a box round it taken away."""
    text = re.sub(
        r"\\(?:boxed|text|textbf|mathrm|fbox)\b|[*_`#~]{1,4}|</?(?:answer|think|solution|final_answer)>", " ", _visible(text)
    )
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line).strip()

"""The HTML of the report, a jinja2 template: one page that needs nothing else."""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
:root { --ink: #1c2330; --soft: #5b6675; --line: #dfe4ea; --wash: #f6f8fa; }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink);
       max-width: 1120px; margin: 0 auto; padding: 2rem 1.5rem 5rem; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: 1rem;
     border-top: 1px solid var(--line); } h3 { font-size: 1.02rem; margin: 1.6rem 0 .3rem; }
p, li { max-width: 78ch; } .soft { color: var(--soft); } img { max-width: 100%; height: auto; display: block; margin: .8rem 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; white-space: nowrap; }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th { background: var(--wash); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: var(--wash); }
.alarm { border: 2px solid #b00020; background: #fdecee; color: #7a0016; padding: .8rem 1rem; font-weight: 600; border-radius: 6px; }
.note { border-left: 4px solid #e69f00; background: #fff8e8; padding: .6rem 1rem; border-radius: 4px; }
dl { display: grid; grid-template-columns: max-content auto; gap: .15rem 1.2rem; margin: .8rem 0; } dt { color: var(--soft); } dd { margin: 0; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<dl>{% for name, value in facts.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% for text in notes %}<p class="note">{{ text }}</p>{% endfor %}

<h2>Memorization scores</h2>
{% for part in scores %}
{% if not part.summary.passes_gate %}<p class="alarm">The subset models do not fit their subsets: accuracy
{{ "%.4f"|format(part.summary.in_accuracy) }} overall (gate 0.995){% if part.summary.hard_in_accuracy is not none %},
{{ "%.3f"|format(part.summary.hard_in_accuracy) }} on examples that are mostly wrong outside (gate 0.97){% endif %}.
These scores understate memorization; train the subset models longer.</p>{% endif %}
<p>{{ part.summary.num_examples }} training examples, {{ part.summary.num_models }} subset models
(scores <code>{{ part.key[:8] }}</code>). Accuracy on their own subset {{ "%.4f"|format(part.summary.in_accuracy) }}{% if
part.summary.hard_in_accuracy is not none %}, and {{ "%.3f"|format(part.summary.hard_in_accuracy) }} on examples that are
mostly wrong outside it{% endif %}.</p>
{% if part.summary.auc is not none %}
<p>{{ part.summary.num_flipped }} labels are known to be flipped. The score finds them with an AUC of
<b>{{ "%.4f"|format(part.summary.auc) }}</b>, and {{ "%.0f"|format(100 * part.summary.precision) }} % of the
{{ part.summary.num_flipped }} highest scores are flipped labels. Held-out error alone (one minus the accuracy of the models
that did not see an example) has an AUC of <b>{{ "%.4f"|format(part.summary.held_out_auc) }}</b>:
{{ "for finding wrong labels it does about as well" if (part.summary.auc - part.summary.held_out_auc)|abs < 0.01
   else "the two differ" }}. What the score adds is that the model fits the example when it sees it.</p>{% endif %}
<img alt="Histogram of memorization scores" src="{{ part.distribution }}">
<h3>The {{ part.num_shown }} most memorized images</h3>
<p class="soft">Score ± standard error. Orange: the given label was flipped.</p>
<img alt="Most memorized images with given and true labels" src="{{ part.gallery }}">
{% else %}<p class="note">No memorization scores are stored. <code>unlearn memorize</code> makes them.</p>{% endfor %}

<h2>Unlearning</h2>
{% if quality %}
<p>Every point is one setting, averaged over its seeds; nothing is selected. Above zero, a run forgets more than a model that
never saw the forget set; inside the grey band it cannot be told from one more reference.</p>
<img alt="Forget quality against budget" src="{{ quality }}">
{% for table in tables %}
<h3>{{ table.name }}</h3>
<p class="soft">{{ table.caption }}</p>
<div class="scroll"><table><thead><tr>{% for name in table.columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for line in table.lines %}<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endfor %}
{% else %}<p class="note">No finished runs are stored. <code>unlearn sweep</code> makes them.</p>{% endif %}
{% if failed %}<h3>Failed runs</h3><p>{{ failed }} runs of this sweep failed; <code>unlearn status</code> says why.</p>{% endif %}

{% if paired %}
<h2>Does the localization matter?</h2>
<p>DEL against the control that resets as many channels of each layer, drawn at random (random_within_tensor), and against
retraining for as many steps. Difference in tug-of-war, paired on the original's seed; above zero, DEL is closer to the
references. {{ paired.significant }} of {{ paired.lines|length }} comparisons have p &lt; 0.05 after Holm's adjustment.</p>
<div class="scroll"><table><thead><tr>{% for name in paired.columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for line in paired.lines %}<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endif %}

{% if layers %}
<h2>Where the masks are</h2>
<p>Share of each layer's entries that a mask resets (for SalUn: lets train), mean over forget sets and seeds.</p>
<img alt="Share of each layer in the masks" src="{{ layers }}">
{% endif %}

<h2>How it was measured</h2>
<ul>
<li>A difference is reference minus run, in percentage points of accuracy on the given labels. Intervals are 95 % t-intervals
with Satterthwaite's degrees of freedom over the seeds of runs and of references.</li>
<li>Tug-of-war is the product over forget, retain and test of one minus the absolute difference in accuracy, averaged over
(run, reference) pairs; its floor is what references score against one another.</li>
<li>Excess disagreement is the share of the forget set predicted differently from the references, minus the same among
references. A model can match every accuracy and still be wrong in another way.</li>
<li>The membership AUC compares the confidence of forget and test examples at equal label distribution; its target is the
references' own value, not 0.5. The columns called published are the SVC attacks of the papers.</li>
<li>Forget sets are drawn once, so all numbers are conditional on the draw. Seeds vary the original and the unlearning
together.</li>
<li>Each setting is its own line. Whoever picks the best line of a table should tune on other seeds and report on these.</li>
</ul>
<p class="soft">Export {{ export_id }}.</p>
</body>
</html>
"""

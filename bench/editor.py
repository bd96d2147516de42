"""How fluent typing is in a function of 5,000 lines: python3 bench/editor.py (needs waitress, selenium, Chromium)

Serves such a function, opens it in the editor and types 300 keys at 20 a second in its middle, a tenth of them Enter, Tab or
Backspace. Prints the longest frames and how many took more than 50 ms, and what the page itself did in tasks that long.
"""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
LINES, KEYS = 5000, 300
WATCH = """
window.frames_ = []; window.long_ = []; let last = performance.now();
const step = now => { window.frames_.push(now - last); last = now; requestAnimationFrame(step); };
requestAnimationFrame(now => { last = now; requestAnimationFrame(step); });
new PerformanceObserver(list => list.getEntries().forEach(entry => window.long_.push(entry.duration))).observe(
  {entryTypes: ["longtask"]});
const code = document.querySelector("textarea.code"), at = code.value.indexOf("\\n", code.value.length / 2);
code.focus(); code.setSelectionRange(at, at);
"""


def type_keys(browser: object) -> None:
    """Type as a quick typist does, through Chromium's own input."""
    from selenium.webdriver import Keys
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    special = (Keys.ENTER, Keys.TAB, Keys.BACKSPACE)
    for number in range(KEYS):
        actions = ActionBuilder(browser, duration=0)
        key = special[number // 10 % 3] if number % 10 == 9 else "some_name = "[number % 12]
        actions.key_action.key_down(key).key_up(key)
        began = time.perf_counter()
        actions.perform()
        time.sleep(max(0.0, .05 - (time.perf_counter() - began)))


def main() -> None:
    """Measure and print."""
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    with tempfile.TemporaryDirectory() as directory:
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                     f"--user-data-dir={directory}/profile"):
            options.add_argument(flag)
        function = Path(directory, "functions", "long.py")
        function.parent.mkdir()
        function.write_text("def main(request):\n    return 'x'\n" + "".join(
            f"    value_{number} = request.args.get('{number}', {number})  # 值\n" for number in range(LINES - 2)))
        shutil.copy(HERE.parent / "fnserve.py", directory)
        env = {**os.environ, "FNSERVE_SECRET_TOKEN": "token", "FNSERVE_SECRET_KEY": "key"}
        server = subprocess.Popen([sys.executable, "fnserve.py", "--port", "0", "--workers", "1"], cwd=directory, env=env,
                                  stdout=subprocess.PIPE, text=True)
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            base = re.search(r"http://[\d.:]+", server.stdout.readline() if server.stdout else "")[0]  # type: ignore[index]
            browser.get(base + "/login")
            browser.find_element("css selector", "#token").send_keys("token\n")
            time.sleep(1)
            browser.get(base + "/function/edit_function?module_name=long")
            browser.execute_script(WATCH)
            time.sleep(1)
            before = len(browser.execute_script("return frames_"))
            type_keys(browser)
            frames = sorted(browser.execute_script("return frames_")[before:])
            tasks = browser.execute_script("return long_")
            typed = browser.execute_script("return document.querySelector('textarea.code').value.length") - len(
                function.read_text())
            print(f"{LINES} lines, {KEYS} keys, {typed} characters more; {len(frames)} frames: median"
                  f" {frames[len(frames) // 2]:.0f}, p99 {frames[len(frames) * 99 // 100]:.0f}, longest {frames[-1]:.0f} ms;"
                  f" {sum(frame > 50 for frame in frames)} over 50 ms; tasks over 50 ms: {[round(task) for task in tasks]}")
        finally:
            browser.quit()
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()

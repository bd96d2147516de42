"""Three kinds of users for locust (pip install locust), against the sample functions in functions/ and examples/:

    python3 fnserve.py & locust -f bench/locustfile.py --headless -u 10 -t 30s --host http://127.0.0.1:8000 Normal
"""
from locust import HttpUser, between, constant_pacing, task


class Normal(HttpUser):
    """A mix as people make it: 10 users."""
    wait_time = between(.1, .5)

    @task(5)
    def hello(self):
        self.client.get("/function/hello?name=Tony", name="/function/hello")

    @task(2)
    def add(self):
        self.client.get("/function/add?a=1&b=2", name="/function/add")

    @task(1)
    def health(self):
        self.client.get("/health")


class HighLoad(HttpUser):
    """As fast as the server answers: 20 users."""
    wait_time = constant_pacing(0)

    @task
    def hello(self):
        self.client.get("/function/hello?name=Tony", name="/function/hello")


class Invalid(HttpUser):
    """Requests that are wrong; what counts is that each gets the right error."""
    wait_time = between(.05, .2)

    def expect(self, status, method, path, **options):
        with self.client.request(method, path, catch_response=True, **options) as answer:
            if answer.status_code == status:
                answer.success()
            else:
                answer.failure(f"{answer.status_code} instead of {status}")

    @task
    def unknown(self):
        self.expect(404, "GET", "/function/nope")

    @task
    def traversal(self):
        self.expect(404, "GET", "/function/..%2f..%2fetc%2fpasswd")

    @task
    def protected(self):
        self.expect(401, "GET", "/function/list_functions")

    @task
    def bad_login(self):
        self.expect(400, "POST", "/login", data="{bad", headers={"Content-Type": "application/json"})
